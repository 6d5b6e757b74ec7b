"""Pictures of graphs: one neutral model (`view`), and what is made of it (`svg`, `dot`)."""
