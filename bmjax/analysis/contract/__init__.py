"""What each kind of part must honour, as named checks: `bmjax check`."""
