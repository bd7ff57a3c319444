"""CLAIM and RELEASE: which server may run which due time, and until when."""
