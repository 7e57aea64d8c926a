"""Files that survive: written whole or not at all, locked while in use, put aside before they are replaced."""
