// node otlp.mjs HOST:PORT ROLLOUT_ID ATTEMPT_ID: a program that knows nothing of the store but OpenTelemetry.
// The attributes of the resource say which attempt its spans belong to.

import { ROOT_CONTEXT, SpanStatusCode, trace } from '@opentelemetry/api';
import { OTLPTraceExporter } from '@opentelemetry/exporter-trace-otlp-grpc';
import { resourceFromAttributes } from '@opentelemetry/resources';
import { BasicTracerProvider, BatchSpanProcessor } from '@opentelemetry/sdk-trace-base';

const [address, rolloutId, attemptId] = process.argv.slice(2);
const provider = new BasicTracerProvider({
  resource: resourceFromAttributes({
    'agentlightning.rollout_id': rolloutId,
    'agentlightning.attempt_id': attemptId,
  }),
  spanProcessors: [new BatchSpanProcessor(new OTLPTraceExporter({ url: `http://${address}` }))],
});
const tracer = provider.getTracer('example', '1.0');
const outer = tracer.startSpan('chat', { attributes: { model: 'none', tokens: 3, ratio: 0.5, stops: ['a', 'b'] } });
outer.addEvent('token', { text: 'ä' });
const context = trace.setSpan(ROOT_CONTEXT, outer);
tracer.startSpan('tool', {}, context).end();
outer.setStatus({ code: SpanStatusCode.ERROR, message: 'went wrong' });
outer.end();
await provider.shutdown();
