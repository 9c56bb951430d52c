"""Every error clinifed raises, one tree, each with the exit code of the command that ends with it.

::

    ClinifedError                 1  anything below
    ├── ConfigError               2  a wrong setting: file, key, value, what to do
    ├── DataError                 3  a manifest, an image or a folder that cannot be used
    ├── ModelError                4  a backbone, a head or a checkpoint that cannot be used
    ├── PrivacyError              5  a promise to patients that would not hold
    │   ├── BudgetExceededError   5  the site's lifetime budget does not pay for this
    │   └── LedgerError           5  the budget ledger is missing, damaged or locked
    ├── UpdateError               6  an update that may not enter the aggregate
    ├── FederationError           7  the run did not finish: too few sites, a dead process
    ├── ExportError               8  no engine, or one that is not the model it claims to be
    └── BundleError               9  a bundle that is not what was signed
        └── AuthenticityError    10  nobody vouches for it
"""

from collections.abc import Sequence

__all__ = [
    "INTERRUPTED",
    "AuthenticityError",
    "BudgetExceededError",
    "BundleError",
    "ClinifedError",
    "ConfigError",
    "DataError",
    "ExportError",
    "FederationError",
    "LedgerError",
    "ModelError",
    "PrivacyError",
    "UpdateError",
]


INTERRUPTED = 130  # exit code after Ctrl-C: 128 + SIGINT, as shells expect


class ClinifedError(Exception):
    """Base of all. ``problems`` holds every problem found, so that they are mended in one go."""

    exit_code = 1

    def __init__(self, *problems: str) -> None:
        self.problems: Sequence[str] = problems or (type(self).__name__,)
        super().__init__("\n".join(self.problems))


class ConfigError(ClinifedError):
    """A setting is wrong; nothing was started."""

    exit_code = 2


class DataError(ClinifedError):
    """Images, labels or a manifest cannot be used."""

    exit_code = 3


class ModelError(ClinifedError):
    """A backbone, a head or a checkpoint cannot be used."""

    exit_code = 4


class PrivacyError(ClinifedError):
    """Going on would break a privacy guarantee; nothing was released."""

    exit_code = 5


class BudgetExceededError(PrivacyError):
    """The charge would exceed the site's budget; nothing was drawn, nothing was released."""


class LedgerError(PrivacyError):
    """The ledger cannot be trusted or written; training stops."""


class UpdateError(ClinifedError):
    """An update was refused whole; ``reason`` is one short word for tables and metrics."""

    exit_code = 6

    def __init__(self, reason: str, *problems: str) -> None:
        self.reason = reason
        super().__init__(*(problems or (reason,)))


class FederationError(ClinifedError):
    """The federation did not finish."""

    exit_code = 7


class ExportError(ClinifedError):
    """The export failed; no bundle was left behind."""

    exit_code = 8


class BundleError(ClinifedError):
    """A bundle is not what was signed; nothing in it was used."""

    exit_code = 9


class AuthenticityError(BundleError):
    """Nobody who is trusted vouches for the bundle, whatever its hashes say."""

    exit_code = 10
