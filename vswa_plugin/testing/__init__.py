"""What plugin authors and test suites build on. It is empty in this version."""
