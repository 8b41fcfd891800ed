"""The engine of linear recurrences, in chunks, in steps and over devices, and the recurrences by name."""
