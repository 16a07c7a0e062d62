// A runner: claims rollouts, runs the agent on them, reports what came of it, until it is told to end.

import { randomUUID } from 'node:crypto';
import { WorkerSession } from './session.mjs';
import { Tracer } from './spans.mjs';
import { isWorthAnotherTry } from './store.mjs';

const WAIT_SECONDS = 2; // the server answers as soon as there is work; this is how long an idle runner takes to drain

/** Why an agent is interrupted: the store has closed its attempt, so there is nothing to report. */
export class Cancelled extends Error {}

export class Runner {
  /**
   * @param {import('./store.mjs').Store} store
   * @param {(task: any, tools: {tracer: Tracer, resources: object, signal: AbortSignal}) => Promise<number>} agent
   *   Does the work and returns a reward. It must heed `signal`, which is aborted when the attempt is called off.
   * @param {object} [options]
   * @param {string} [options.workerId]
   * @param {number} [options.heartbeatMs]
   * @param {(line: string) => void} [options.log]
   */
  constructor(store, agent, { workerId = `node-${process.pid}`, heartbeatMs = 5000, log = () => {} } = {}) {
    Object.assign(this, { store, agent, heartbeatMs, log });
    this.me = { worker_id: workerId, instance_id: randomUUID() };
    this.draining = false;
    this.running = new Map(); // by attempt_id: what interrupts it
  }

  /** Works until `drain` or `stop` is called or commanded. */
  async run() {
    const session = new WorkerSession(this.store, this.me, this.heartbeatMs, {
      attempts: () => [...this.running.values()].map(({ rollout_id, attempt_id }) => ({ rollout_id, attempt_id })),
      command: (command) => this.obey(command),
    });
    try {
      while (!this.draining) {
        for (const rollout of await this.claim()) await this.execute(rollout);
      }
    } finally {
      session.close();
    }
  }

  /** Finishes what is being run, and claims no more. */
  drain() {
    this.draining = true;
  }

  /** Interrupts what is being run, and claims no more. */
  stop() {
    this.drain();
    for (const { interrupt } of this.running.values()) interrupt.abort(new Cancelled('told to stop'));
  }

  obey(command) {
    this.log(`told: ${command.command}`);
    if (command.command === 'drain') this.drain();
    if (command.command === 'stop') this.stop();
    if (command.command === 'cancel_attempt') {
      this.running.get(command.cancel_attempt.attempt_id)?.interrupt.abort(new Cancelled('cancelled'));
    }
  }

  /** Waits for work at the server, which answers as soon as there is some. */
  async claim() {
    const request = { ...this.me, limit: 1, wait_seconds: WAIT_SECONDS };
    try {
      return (await this.store.call('DequeueRollouts', request, { waitMs: WAIT_SECONDS * 1000 })).rollouts;
    } catch (error) {
      if (!isWorthAnotherTry(error)) throw error;
      this.log(`the server stays away: ${error.details}`); // `call` has waited; go on asking
      return [];
    }
  }

  async execute(rollout) {
    const { rollout_id, attempt_id } = rollout.latest_attempt;
    const attempt = { rollout_id, attempt_id };
    const interrupt = new AbortController();
    this.running.set(attempt_id, { ...attempt, interrupt });
    this.log(`begin: ${attempt_id}`);
    const status = await this.runAgent(rollout, attempt, interrupt.signal);
    this.running.delete(attempt_id);
    // the store has closed an attempt that was interrupted: there is nothing to report
    if (interrupt.signal.aborted) this.log(`interrupted: ${attempt_id}`);
    else await this.report(attempt, status);
  }

  async runAgent(rollout, attempt, signal) {
    try {
      const tracer = new Tracer(this.store, attempt);
      const tools = { tracer, resources: await this.resourcesOf(rollout), signal };
      await tracer.reward(await this.agent(JSON.parse(rollout.input_json), tools));
      return 'ATTEMPT_STATUS_SUCCEEDED';
    } catch (error) {
      if (!signal.aborted) this.log(`failed: ${attempt.attempt_id}: ${error}`);
      return 'ATTEMPT_STATUS_FAILED';
    }
  }

  /** The resources that the rollout is bound to, by name. */
  async resourcesOf({ resources_id }) {
    if (!resources_id) return {};
    const { update } = await this.store.call('GetResources', { resources_id });
    const entries = update?.resources.map(({ name, value_json }) => [name, JSON.parse(value_json)]);
    return Object.fromEntries(entries ?? []);
  }

  async report(attempt, status) {
    await this.store.call('UpdateAttempt', { ...attempt, status, update_mask: { paths: ['status'] } });
    this.log(`${status}: ${attempt.attempt_id}`);
  }
}
