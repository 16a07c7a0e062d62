import lightning as lt


@lt.rollout
def answer(task, prompt_template):
    """The agent: gets a task and the resources that it asks for by name, and returns a reward."""
    claim = prompt_template.format(number=task)
    return 1.0 if claim.endswith("even") == (task % 2 == 0) else 0.0


class TryPrompts(lt.Algorithm):
    """The algorithm: publishes resources, hands out work, reads what happened."""

    async def run(self, train_dataset=None, val_dataset=None):
        store = self.get_store()
        for template in ("{number} is odd", "{number} is even"):
            await store.add_resources({"prompt": lt.PromptTemplate(template=template)})
            rollouts = [await store.enqueue_rollout(task) for task in train_dataset]
            await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id for rollout in rollouts])
            rewards = [lt.find_final_reward(await store.query_spans(r.rollout_id)) for r in rollouts]
            print(f"{template}: mean reward {sum(rewards) / len(rewards):.2f}")


if __name__ == "__main__":  # a store server and two runners in processes of their own, over gRPC
    lt.Trainer(algorithm=TryPrompts(), n_runners=2).fit(answer, train_dataset=[1, 2, 3, 5, 7, 8, 9, 11])
