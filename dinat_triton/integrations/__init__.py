"""Other libraries' neighborhood attention, on ours."""
