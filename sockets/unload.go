package sockets

// Unload closes what Find and NetNSCookies keep open for their next call, which
// then loads it again. It may be called at any time, concurrently too.
func Unload() {
	theFinder.Lock()
	theFinder.close()
	theFinder.Unlock()

	theLister.Lock()
	if theLister.loaded {
		theLister.objects.Close()
		theLister.loaded = false
	}
	theLister.Unlock()
}
