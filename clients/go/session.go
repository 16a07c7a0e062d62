package main

import (
	"context"
	"time"

	pb "agentlightning/clients/go/stubs/lightningpb/v1"
)

const reopenDelay = 500 * time.Millisecond

// keepSession sends heartbeats and obeys commands, by one stream that is opened again whenever it breaks, until ctx ends.
func (r *Runner) keepSession(ctx context.Context) {
	for ctx.Err() == nil && !r.session(ctx) {
		select {
		case <-time.After(reopenDelay):
		case <-ctx.Done():
		}
	}
}

// session is one stream, until it breaks. It returns whether another process, or another stream of this one, has taken
// its place.
func (r *Runner) session(parent context.Context) bool {
	ctx, cancel := context.WithCancel(r.store.as(parent))
	defer cancel()
	stream, err := r.store.WorkerSession(ctx)
	if err != nil {
		return false
	}
	hello := &pb.WorkerSessionRequest_Hello{WorkerId: r.workerID, InstanceId: &r.instanceID}
	if stream.Send(&pb.WorkerSessionRequest{Message: &pb.WorkerSessionRequest_Hello_{Hello: hello}}) == nil {
		go r.beat(ctx, stream)
	}
	for {
		message, err := stream.Recv()
		if err != nil {
			return false
		}
		if command := message.GetCommand(); command != nil {
			r.obey(command)
		}
		if message.GetClosing().GetReason() == pb.CloseReason_CLOSE_REASON_SUPERSEDED {
			return true
		}
	}
}

// beat shows at intervals that this process, and the attempt that it runs, are alive.
func (r *Runner) beat(ctx context.Context, stream pb.LightningStoreService_WorkerSessionClient) {
	ticker := time.NewTicker(r.Heartbeat)
	defer ticker.Stop()
	silent := (2*r.Heartbeat + time.Second).Seconds()
	for {
		heartbeat := &pb.WorkerHeartbeat{
			WorkerId: r.workerID, InstanceId: r.instanceID, Attempts: r.attempts(), SilentAfterSeconds: &silent,
		}
		message := &pb.WorkerSessionRequest{Message: &pb.WorkerSessionRequest_Heartbeat{Heartbeat: heartbeat}}
		if stream.Send(message) != nil {
			return // Recv says why
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}
