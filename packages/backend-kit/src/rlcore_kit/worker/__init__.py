"""Worker processes that run code of users, within limits, and that leave nothing behind."""
