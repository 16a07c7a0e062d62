package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "agentlightning/clients/go/stubs/lightningpb/v1"
)

const callDeadline = 10 * time.Second

var retryDelays = []time.Duration{100 * time.Millisecond, time.Second, 2 * time.Second, 5 * time.Second}

// Store is the store as a runner sees it.
type Store struct {
	pb.LightningStoreServiceClient
	connection *grpc.ClientConn
	token      string
}

// Connect prepares a connection to the server at address (HOST:PORT), which is made when it is first needed. The token
// is for servers that ask for one; its role must be "runner".
func Connect(address, token string) (*Store, error) {
	connection, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // credentials.NewTLS for a server that has a certificate
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(256<<20)),
	)
	if err != nil {
		return nil, err
	}
	return &Store{pb.NewLightningStoreServiceClient(connection), connection, token}, nil
}

// Close ends the connection.
func (s *Store) Close() error { return s.connection.Close() }

// as adds the token to the calls made with a context.
func (s *Store) as(ctx context.Context) context.Context {
	if s.token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+s.token)
}

// call makes a call, and repeats it while the server is away. The request holds its request_id already, so a repeat is
// answered with the outcome of the first: nothing is claimed or stored twice. The server may take `wait` longer than usual.
func call[Request, Response any](
	ctx context.Context, s *Store, wait time.Duration, request Request,
	method func(context.Context, Request, ...grpc.CallOption) (Response, error),
) (Response, error) {
	for tries := 0; ; tries++ {
		limited, cancel := context.WithTimeout(s.as(ctx), callDeadline+wait)
		response, err := method(limited, request)
		cancel()
		if err == nil || ctx.Err() != nil || tries == len(retryDelays) || !isWorthAnotherTry(err) {
			return response, err
		}
		select {
		case <-time.After(retryDelays[tries]):
		case <-ctx.Done():
			return response, ctx.Err()
		}
	}
}

// isWorthAnotherTry tells whether a call did not get through, or its answer was lost.
func isWorthAnotherTry(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}

// randomHex returns so many random bytes as text: an id.
func randomHex(bytes int) string {
	id := make([]byte, bytes)
	if _, err := rand.Read(id); err != nil {
		panic(err) // no source of randomness: nothing can go on
	}
	return hex.EncodeToString(id)
}
