package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/internal/metrics"
)

// web serves /metrics and /healthz.
type web struct {
	place string
	http.Server
	ended chan error
}

// How long a client may take, all there is to say being small, and how many there may
// be: everybody on the machine can connect, and must not take the agent's descriptors.
const (
	readTime   = 5 * time.Second
	writeTime  = 30 * time.Second
	idleTime   = 2 * time.Minute
	maxClients = 64
)

// serve makes the agent serve where its file says. It works without, too.
func (k *keeper) serve() {
	if k.web != nil && k.web.place == k.place {
		return
	}
	k.web.close()
	k.web = nil
	k.webTried = time.Now()
	if k.place == "" {
		k.fails("metrics", nil)
		return
	}
	l, err := listen(k.place)
	if err != nil {
		k.fails("metrics", fmt.Errorf("metrics are not served: %w: give another place, or \"off\", as metrics in %s; it is tried again every %v", err, k.Config, k.pace.retry))
		return
	}
	k.fails("metrics", nil)
	collector := metrics.New(k.Version, metrics.Reader(k.FS), func() metrics.Agent { return k.report.Load().agent })
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics.Handler(collector, k.Log))
	mux.HandleFunc("GET /healthz", k.healthz)
	w := &web{place: k.place, ended: make(chan error, 1), Server: http.Server{
		Handler: mux, ReadTimeout: readTime, WriteTimeout: writeTime, IdleTimeout: idleTime, MaxHeaderBytes: 1 << 16,
	}}
	go func() { w.ended <- w.Serve(netutil.LimitListener(l, maxClients)) }()
	k.web = w
	k.Log.Info("metrics are served", "at", k.place)
}

// keepServing tries again what failed.
func (k *keeper) keepServing() {
	if k.web != nil {
		select {
		case err := <-k.web.ended:
			k.fails("metrics", fmt.Errorf("metrics are not served any more: %w", err))
			k.web.Close() // ends whom it still serves
			k.web = nil
		default:
		}
	}
	if k.web == nil && k.place != "" && time.Since(k.webTried) >= k.pace.retry {
		k.serve()
	}
}

// close ends the server, if there is one, and whom it serves.
func (w *web) close() {
	if w != nil {
		w.Close() // there is nobody to tell
		<-w.ended
	}
}

// healthz is for who watches over the agent: a line, and 503 if it cannot do its work.
func (k *keeper) healthz(w http.ResponseWriter, _ *http.Request) {
	line, healthy := k.report.Load().health(time.Now())
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	if !healthy {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	fmt.Fprintln(w, line)
}

// socketMode lets the agent's group in, too: such a socket is for a proxy.
const socketMode = 0o660

// listen listens at an address and port, or on a unix socket in place of one that
// a killed agent left.
func listen(place string) (net.Listener, error) {
	path, isUnix := strings.CutPrefix(place, config.UnixMetrics)
	if !isUnix {
		return net.Listen("tcp", place)
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, unix.EADDRINUSE) && abandoned(path) {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		l, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, socketMode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// abandoned tells whether there is a socket at a path on which nobody listens.
func abandoned(path string) bool {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return false
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}
