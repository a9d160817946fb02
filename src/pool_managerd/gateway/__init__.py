"""The front door: clients ask for a model by its name; requests go to whichever engine serves it, started if need be."""
