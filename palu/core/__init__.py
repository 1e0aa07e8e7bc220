"""Value types, linear algebra and exact budget arithmetic. Imports nothing of the rest of the library."""
