"""What rlcore's backends share. A backend imports the core's contracts and this package, never another backend."""
