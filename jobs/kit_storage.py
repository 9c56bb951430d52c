"""FLARE's storage in a folder of the kit that it serves, wherever the kit was put."""

from pathlib import Path

from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

__all__ = ["KitStorage"]


class KitStorage(FilesystemStorage):
    """FLARE's file storage beneath a kit. FLARE itself wants an absolute path, which breaks when a kit is moved.

    Args:
        folder: counted from the working folder, which is the kit in each of FLARE's server processes.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder).resolve()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        super().__init__(root_dir=str(path))
