"""Where documents come from: files, archives, folders and the hub."""
