"""``python -m attnfit.cli`` does what ``attnfit`` does."""

from attnfit.cli import main

main()
