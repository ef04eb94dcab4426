"""One defense a file; the file's name is the defense's name. See CONTRIBUTING.md."""
