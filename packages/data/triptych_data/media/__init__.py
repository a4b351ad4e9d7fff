"""Images, videos and sound: what files hold, and the patches and features made of them."""
