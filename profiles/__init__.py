"""What devices are: profiles, their schema, and which of them fit this machine."""
