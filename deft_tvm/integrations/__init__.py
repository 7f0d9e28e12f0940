"""Other libraries' models over `deft_tvm`; each package is imported by name, with what it needs."""
