// Heartbeats up, commands down: one stream for as long as the runner lives, opened again whenever it breaks.

const REOPEN_MS = 500;

export class WorkerSession {
  /**
   * @param {import('./store.mjs').Store} store
   * @param {object} me
   * @param {string} me.worker_id Names the worker.
   * @param {string} me.instance_id Names this process: fresh at each start.
   * @param {number} heartbeatMs How often to show that this process, and the attempts it runs, are alive.
   * @param {object} handlers
   * @param {() => object[]} handlers.attempts The attempts that are being run.
   * @param {(command: object) => void} handlers.command Hears of what the server wants.
   */
  constructor(store, me, heartbeatMs, handlers) {
    Object.assign(this, { store, me, heartbeatMs, handlers });
    this.closed = false;
    this.open();
    this.timer = setInterval(() => this.beat(), heartbeatMs);
  }

  open() {
    this.stream = this.store.workerSession();
    this.stream.on('data', (message) => {
      if (message.message === 'command') this.handlers.command(message.command);
      // another process, or another stream of this one, has taken our place
      if (message.closing?.reason === 'CLOSE_REASON_SUPERSEDED') this.close();
    });
    this.stream.on('error', () => this.reopen()); // an "end" without an error follows a `closing`
    this.stream.on('end', () => this.reopen());
    this.stream.write({ hello: this.me });
    this.beat();
  }

  reopen() {
    if (this.closed || this.reopening) return;
    this.reopening = setTimeout(() => {
      this.reopening = undefined;
      this.open();
    }, REOPEN_MS);
  }

  beat() {
    if (this.closed || this.reopening) return;
    const silent_after_seconds = (2 * this.heartbeatMs) / 1000 + 1;
    this.stream.write({ heartbeat: { ...this.me, attempts: this.handlers.attempts(), silent_after_seconds } });
  }

  close() {
    this.closed = true;
    clearInterval(this.timer);
    clearTimeout(this.reopening);
    this.stream.end();
  }
}
