"""Many configurations of one experiment, chosen between on validation: `bmjax sweep`."""
