/* The symbols that TensorRT's Python bindings need to be imported: libraries without the library. Every factory returns
   null, as the real ones do where there is no GPU. */
#define NOTHING(name) \
    void *name(void) { return 0; }

NOTHING(createInferBuilder_INTERNAL)
NOTHING(createInferRefitter_INTERNAL)
NOTHING(createInferRuntime_INTERNAL)
NOTHING(createNvOnnxParserRefitter_INTERNAL)
NOTHING(createNvOnnxParser_INTERNAL)
NOTHING(getBuilderPluginRegistry)
NOTHING(getNvOnnxParserVersion)
NOTHING(getPluginRegistry)
NOTHING(initLibNvInferPlugins)
