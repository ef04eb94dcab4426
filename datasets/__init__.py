"""One dataset a file; the file's name is the dataset's name. See CONTRIBUTING.md."""
