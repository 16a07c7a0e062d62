package main

import (
	"context"
	"fmt"
	"time"

	pb "agentlightning/clients/go/stubs/lightningpb/v1"
)

// Attributes are the details of a span: text, bool, int64 and float64 values by name.
type Attributes map[string]any

// Tracer records what one attempt does, and sends each span when it ends. The server numbers them as they arrive.
type Tracer struct {
	store   *Store
	attempt *pb.AttemptRef
	traceID string
}

// Span runs work inside a span, as a child of the span with the id parent if that is not empty.
func (t *Tracer) Span(
	ctx context.Context, name, parent string, attributes Attributes, work func(spanID string) error,
) error {
	span := &pb.Span{
		RolloutId: t.attempt.RolloutId, AttemptId: t.attempt.AttemptId,
		TraceId: t.traceID, SpanId: randomHex(8), Name: name, StartTime: now(),
	}
	if parent != "" {
		span.ParentId = &parent
	}
	var err error
	if span.Attributes, err = encode(attributes); err != nil {
		return err
	}
	err = work(span.SpanId)
	span.EndTime, span.Status = now(), &pb.SpanStatus{Code: pb.StatusCode_STATUS_CODE_OK}
	if err != nil {
		description := err.Error()
		span.Status = &pb.SpanStatus{Code: pb.StatusCode_STATUS_CODE_ERROR, Description: &description}
	}
	request := &pb.AddSpansRequest{RequestId: randomHex(16), Spans: []*pb.Span{span}}
	if _, sendErr := call(ctx, t.store, 0, request, t.store.AddSpans); err == nil {
		err = sendErr
	}
	return err
}

// Reward records the reward that lightning.find_final_reward finds.
func (t *Tracer) Reward(ctx context.Context, value float64) error {
	attributes := Attributes{"agentlightning.reward.0.name": "primary", "agentlightning.reward.0.value": value}
	return t.Span(ctx, "agentlightning.annotation", "", attributes, func(string) error { return nil })
}

func encode(attributes Attributes) ([]*pb.Attribute, error) {
	encoded := make([]*pb.Attribute, 0, len(attributes))
	for key, value := range attributes {
		message := &pb.AttributeValue{}
		switch typed := value.(type) {
		case string:
			message.Value = &pb.AttributeValue_StringValue{StringValue: typed}
		case bool:
			message.Value = &pb.AttributeValue_BoolValue{BoolValue: typed}
		case int64:
			message.Value = &pb.AttributeValue_IntValue{IntValue: typed}
		case float64:
			message.Value = &pb.AttributeValue_DoubleValue{DoubleValue: typed}
		default:
			return nil, fmt.Errorf("the attribute %q cannot be a %T", key, value)
		}
		encoded = append(encoded, &pb.Attribute{Key: key, Value: message})
	}
	return encoded, nil
}

func now() *float64 {
	seconds := float64(time.Now().UnixNano()) / 1e9
	return &seconds
}
