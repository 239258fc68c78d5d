package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/rpsel/rpsel/internal/config"
	"github.com/rpsel/rpsel/loader"
	"github.com/rpsel/rpsel/sockets"
)

// serviceFinding is what a service of the agent's file finds.
type serviceFinding struct {
	Line    int    `json:"line"`
	Service string `json:"service"`
	OK      bool   `json:"ok"`
	Detail  string `json:"detail"`
}

// services looks what each service finds now. One that finds nothing is fine:
// the agent waits for its servers.
func (c *checker) onServices(list []config.Service) {
	for _, s := range list {
		groups, err := c.ofService(s)
		if err == nil && len(groups) == 0 {
			c.service(s, "no server is there now: the agent waits for one", nil)
		}
		if err != nil {
			c.service(s, "", err)
		}
		for _, g := range groups {
			detail, err := c.planService(s, g)
			c.service(s, detail, err)
		}
	}
}

func (c *checker) service(s config.Service, detail string, err error) {
	f := serviceFinding{s.Line, s.String(), err == nil, detail}
	if err != nil {
		f.Detail = errorText(err, false)
		c.fail(finding{Name: s.String(), For: "agent", Detail: f.Detail}, exitCode(err))
	}
	c.services = append(c.services, f)
}

// ofService finds what a service is about.
func (c *checker) ofService(s config.Service) ([]sockets.Group, error) {
	q := sockets.Query{Proto: s.Proto, Port: s.Port, Addr: s.Addr}
	if s.NetNS != config.AllNetNS {
		ns, err := sockets.OpenNetNS(s.NetNS)
		if errors.Is(err, sockets.ErrNoNetNS) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		ns.Close()
		q.NetNS = ns.Cookie()
	}
	groups, err := sockets.Find(q)
	return slices.DeleteFunc(groups, sockets.Group.Connected), err
}

// planService says what the agent would do with a group.
func (c *checker) planService(s config.Service, g sockets.Group) (string, error) {
	name := c.groupName(g.Key)
	if g.Kernel == 0 {
		err := g.Members[0].Check()
		if s.Adopt && errors.Is(err, sockets.ErrNoReuseport) {
			return fmt.Sprintf("%s: to be adopted from %s", name, socketName(g.Members[0])), nil
		}
		return "", fmt.Errorf("%s: %w", name, err)
	}
	var p loader.Plan
	err := withMember(g, func(conn *sockets.Conn) (err error) {
		p, err = c.fs().Plan(conn, s.Options)
		return err
	})
	switch {
	case err != nil:
		return "", err
	case p.Attached:
		return fmt.Sprintf("%s: attached, %s to register", name, plural(len(p.Register), "listener")), nil
	default:
		return fmt.Sprintf("%s: %s to register", name, plural(len(p.Register), "listener")), nil
	}
}
