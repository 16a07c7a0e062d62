// An example runner of agent-lightning-grpc, on stubs made from protos/.
//
//	bin/runner [HOST:PORT [WORKER_ID]]
//
// runs the agent below. The token, where one is asked for, is in LIGHTNING_TOKEN.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"
)

type task struct {
	N       float64
	Seconds float64
	Fail    string
}

// square is the agent: it squares a number, slowly if the task says so.
func square(ctx context.Context, input json.RawMessage, resources Resources, tracer *Tracer) (float64, error) {
	var given task
	if err := json.Unmarshal(input, &given); err != nil {
		return 0, err
	}
	if given.Fail != "" {
		return 0, errors.New(given.Fail)
	}
	details := Attributes{"n": int64(given.N), "language": "go"}
	err := tracer.Span(ctx, "square", "", details, func(parent string) error {
		thought := Attributes{"prompt": promptOf(resources)}
		if err := tracer.Span(ctx, "think", parent, thought, func(string) error { return nil }); err != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(given.Seconds * float64(time.Second))):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	return given.N * given.N, err
}

func promptOf(resources Resources) string {
	var prompt struct{ Template string }
	if json.Unmarshal(resources["prompt"], &prompt) != nil {
		return "" // there is none
	}
	return prompt.Template
}

func main() {
	log.SetFlags(0)
	address, workerID := "127.0.0.1:4747", fmt.Sprintf("go-%d", os.Getpid())
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	if len(os.Args) > 2 {
		workerID = os.Args[2]
	}
	store, err := Connect(address, os.Getenv("LIGHTNING_TOKEN"))
	if err != nil {
		log.Fatal(err)
	}
	runner := NewRunner(store, square, workerID)
	runner.Heartbeat = time.Second
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for given := range signals {
			if given == syscall.SIGTERM {
				runner.Drain()
			} else {
				runner.Stop()
			}
		}
	}()
	if err := runner.Run(); err != nil {
		log.Fatal(err)
	}
	if err := store.Close(); err != nil {
		log.Fatal(err)
	}
	log.Print("drained")
}
