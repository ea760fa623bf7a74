"""``python -m attnfit`` does what ``attnfit`` does."""

from attnfit.cli import main

main()
