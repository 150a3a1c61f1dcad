"""Where a classifier looked, and whether its maps can be trusted: `bmjax explain`."""
