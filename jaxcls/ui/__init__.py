"""What people look at: one front end of ES modules, in a report of one file and in a page of this machine."""
