"""The door for volunteers over the internet: Flower carries the bytes, and members only ever dial out."""
