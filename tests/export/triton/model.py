"""Stands in for the exported graph in Triton's Python backend: the same tensors, made so that a test can check them.

Beside this file, ``batches.txt`` gets a line per batch with the mark (the first value) of each of its images, in order;
while a file ``hold`` is there, a batch that has begun does not end.
"""

import json
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as backend  # the server's own, there only while it runs

HERE = Path(__file__).parent


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        outputs = json.loads(args["model_config"])["output"]
        self.width = {output["name"]: output["dims"][0] for output in outputs}

    def execute(self, requests: list) -> list:
        batch = [backend.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        with (HERE / "batches.txt").open("a") as file:
            file.write(" ".join(f"{image[0, 0, 0]:g}" for pixels in batch for image in pixels) + "\n")
        while (HERE / "hold").exists():
            time.sleep(0.01)
        return [backend.InferenceResponse([self.answer(pixels, name) for name in self.width]) for pixels in batch]

    def answer(self, pixels: np.ndarray, name: str):
        """(B, 3, S, S) → (B, width): each image's first values, times the place of the output."""
        first = pixels.reshape(len(pixels), -1)[:, : self.width[name]]
        return backend.Tensor(name, (1 + list(self.width).index(name)) * first.astype(np.float32))
