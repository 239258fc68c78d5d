package metrics

import (
	"fmt"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// scrapesAtOnce bounds what those who may connect can make of the agent.
const scrapesAtOnce = 4

// Handler serves the collector, and what client_golang tells of the process.
func Handler(c *Collector, log *slog.Logger) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, ErrorLog: errorLog{log}, MaxRequestsInFlight: scrapesAtOnce,
	})
}

// errorLog logs what a scrape lacks.
type errorLog struct{ *slog.Logger }

func (l errorLog) Println(v ...any) { l.Debug(fmt.Sprintln(v...)) }
