"""What all public functions share: names that load when they are used, old forms of calls, checks of arguments."""
