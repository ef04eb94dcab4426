"""One model a file; the file's name is the model's name. See CONTRIBUTING.md."""
