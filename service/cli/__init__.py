"""The command line's nouns, one file each. Every change calls the function that the API calls, and leaves the same entry."""
