"""Documents from anywhere: folders, archives, tables, hubs."""
