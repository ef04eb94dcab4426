"""One attack a file; the file's name is the attack's name. See CONTRIBUTING.md."""
