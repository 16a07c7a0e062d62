package main

import (
	"context"
	"encoding/json"
	"log"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	pb "agentlightning/clients/go/stubs/lightningpb/v1"
)

// The server answers as soon as there is work. This is how long an idle runner takes to drain.
const waitForWork = 2 * time.Second

// Resources are what an algorithm published, each a JSON value by name.
type Resources map[string]json.RawMessage

// Agent does the work and returns a reward. It must return when ctx ends: then its attempt was called off.
type Agent func(ctx context.Context, task json.RawMessage, resources Resources, tracer *Tracer) (float64, error)

// Runner claims rollouts, runs an agent on them, and reports what came of it, until it is told to end.
type Runner struct {
	Heartbeat time.Duration // how often it shows that it is alive

	store      *Store
	agent      Agent
	workerID   string
	instanceID string      // this process: fresh at each start
	draining   atomic.Bool // finish what is being run, and claim no more

	mutex     sync.Mutex
	current   *pb.AttemptRef // what is being run, and
	interrupt context.CancelFunc
}

// NewRunner makes a runner under the name workerID.
func NewRunner(store *Store, agent Agent, workerID string) *Runner {
	return &Runner{
		Heartbeat: 5 * time.Second,
		store:     store, agent: agent, workerID: workerID, instanceID: randomHex(16),
	}
}

// Run works until the runner is drained or stopped, by a call or by a command.
func (r *Runner) Run() error {
	ctx, end := context.WithCancel(context.Background())
	var session sync.WaitGroup
	session.Add(1)
	go func() {
		defer session.Done()
		r.keepSession(ctx)
	}()
	defer session.Wait()
	defer end()
	for !r.draining.Load() {
		rollouts, err := r.claim()
		if isWorthAnotherTry(err) {
			log.Printf("the server stays away: %v", err) // `call` has waited; go on asking
			continue
		}
		if err != nil {
			return err
		}
		for _, rollout := range rollouts {
			if err := r.execute(rollout); err != nil {
				return err
			}
		}
	}
	return nil
}

// Drain has the runner finish what it runs, and claim no more.
func (r *Runner) Drain() { r.draining.Store(true) }

// Stop interrupts what is being run, and has the runner claim no more.
func (r *Runner) Stop() {
	r.Drain()
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.interrupt != nil {
		r.interrupt()
	}
}

func (r *Runner) obey(command *pb.WorkerCommand) {
	log.Printf("told: %T", command.Command)
	switch typed := command.Command.(type) {
	case *pb.WorkerCommand_Drain_:
		r.Drain()
	case *pb.WorkerCommand_Stop_:
		r.Stop()
	case *pb.WorkerCommand_CancelAttempt_:
		r.mutex.Lock()
		defer r.mutex.Unlock()
		if r.current.GetAttemptId() == typed.CancelAttempt.AttemptId {
			r.interrupt()
		}
	}
}

// claim waits for work at the server, which answers as soon as there is some.
func (r *Runner) claim() ([]*pb.Rollout, error) {
	wait := waitForWork.Seconds()
	request := &pb.DequeueRolloutsRequest{
		RequestId: randomHex(16), Limit: 1, WorkerId: &r.workerID, InstanceId: &r.instanceID, WaitSeconds: &wait,
	}
	response, err := call(context.Background(), r.store, waitForWork, request, r.store.DequeueRollouts)
	return response.GetRollouts(), err
}

// execute runs the agent on a rollout. An error means that its result could not be reported.
func (r *Runner) execute(rollout *pb.Rollout) error {
	ctx, interrupt := context.WithCancel(context.Background())
	defer interrupt()
	attempt := &pb.AttemptRef{RolloutId: rollout.RolloutId, AttemptId: rollout.LatestAttempt.AttemptId}
	r.hold(attempt, interrupt)
	defer r.hold(nil, nil)
	log.Printf("begin: %s", attempt.AttemptId)
	err := r.runAgent(ctx, rollout, &Tracer{r.store, attempt, randomHex(16)})
	if ctx.Err() != nil { // the store has closed the attempt: there is nothing to report
		log.Printf("interrupted: %s", attempt.AttemptId)
		return nil
	}
	status := pb.AttemptStatus_ATTEMPT_STATUS_SUCCEEDED
	if err != nil {
		status = pb.AttemptStatus_ATTEMPT_STATUS_FAILED
	}
	log.Printf("%v: %s %v", status, attempt.AttemptId, err)
	_, err = call(context.Background(), r.store, 0, &pb.UpdateAttemptRequest{
		RequestId: randomHex(16), RolloutId: attempt.RolloutId, AttemptId: attempt.AttemptId,
		Status: &status, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"status"}},
	}, r.store.UpdateAttempt)
	return err
}

func (r *Runner) runAgent(ctx context.Context, rollout *pb.Rollout, tracer *Tracer) error {
	resources, err := r.resourcesOf(ctx, rollout)
	if err != nil {
		return err
	}
	reward, err := r.agent(ctx, rollout.InputJson, resources, tracer)
	if err != nil {
		return err
	}
	return tracer.Reward(ctx, reward)
}

// resourcesOf fetches the resources that the rollout is bound to.
func (r *Runner) resourcesOf(ctx context.Context, rollout *pb.Rollout) (Resources, error) {
	resources := Resources{}
	if rollout.ResourcesId == nil {
		return resources, nil
	}
	request := &pb.GetResourcesRequest{ResourcesId: *rollout.ResourcesId}
	response, err := call(ctx, r.store, 0, request, r.store.GetResources)
	for _, resource := range response.GetUpdate().GetResources() {
		resources[resource.Name] = resource.ValueJson
	}
	return resources, err
}

// hold notes what is being run, for heartbeats to name and commands to interrupt.
func (r *Runner) hold(attempt *pb.AttemptRef, interrupt context.CancelFunc) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.current, r.interrupt = attempt, interrupt
}

func (r *Runner) attempts() []*pb.AttemptRef {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.current == nil {
		return nil
	}
	return []*pb.AttemptRef{r.current}
}
