"""Where images come from: folders, globs, lists, tables and tar files, on this machine or in a bucket."""
