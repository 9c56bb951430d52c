"""``python -m clinifed`` is the command ``clinifed``."""

from clinifed.cli import main

if __name__ == "__main__":
    main()
