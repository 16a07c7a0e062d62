// Spans in the store's own messages. (An agent that is traced by OpenTelemetry needs none of this: see otlp.mjs.)

import { randomBytes } from 'node:crypto';

const hex = (bytes) => randomBytes(bytes).toString('hex');
const now = () => Date.now() / 1000;

/** A bigint becomes an integer, a number a float: JavaScript cannot tell 1 from 1.0. */
function toValue(value) {
  if (typeof value === 'string') return { string_value: value };
  if (typeof value === 'boolean') return { bool_value: value };
  if (typeof value === 'bigint') return { int_value: value.toString() };
  if (typeof value === 'number') return { double_value: value };
  if (Array.isArray(value)) return { array_value: { values: value.map(toValue) } };
  throw new TypeError(`a ${typeof value} cannot be an attribute`);
}

const toAttributes = (values) => Object.entries(values).map(([key, value]) => ({ key, value: toValue(value) }));

export class Tracer {
  /** Records what one attempt does, and sends each span when it ends. The server numbers them as they arrive. */
  constructor(store, { rollout_id, attempt_id }) {
    Object.assign(this, { store, rollout_id, attempt_id, trace_id: hex(16) });
  }

  /** Runs `work` inside a span, as a child of `parent` if that is given. */
  async span(name, attributes, work, parent) {
    const span = { name, span_id: hex(8), parent_id: parent?.span_id, start_time: now() };
    const status = { code: 'STATUS_CODE_OK' };
    try {
      return await work(span);
    } catch (error) {
      Object.assign(status, { code: 'STATUS_CODE_ERROR', description: String(error) });
      throw error;
    } finally {
      await this.send({ ...span, end_time: now(), attributes: toAttributes(attributes), status });
    }
  }

  /** Records the reward that `lightning.find_final_reward` finds. */
  async reward(value) {
    const attributes = { 'agentlightning.reward.0.name': 'primary', 'agentlightning.reward.0.value': value };
    await this.span('agentlightning.annotation', attributes, () => {});
  }

  async send(span) {
    const { trace_id, rollout_id, attempt_id } = this;
    await this.store.call('AddSpans', { spans: [{ ...span, trace_id, rollout_id, attempt_id }] });
  }
}
