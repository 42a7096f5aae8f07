"""``python -m pyembed`` is the command ``pyembed``."""

from pyembed.cli import main

raise SystemExit(main())
