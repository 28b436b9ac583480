"""Parts that the pages of demos/ share: a server for this machine or for people with a link, and the HTML of the label page."""
