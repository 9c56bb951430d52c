"""clinifed: hospitals improve a medical vision-language model together, without showing anyone a patient.

Importing this package loads neither torch nor FLARE; the command line imports what a verb needs.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
