//! A value that changes, and tasks that wait for it: as tokio's `watch`, but waiters wake in the order in which they began to
//! wait. Tokio's wake in a random order, and a simulation could not run the same way twice.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

#[derive(Debug)]
struct Versioned<T> {
    value: T,
    /// Rises with every change.
    version: u64,
    /// Nobody is left to change it.
    closed: bool,
}

#[derive(Debug)]
struct Shared<T> {
    state: Mutex<Versioned<T>>,
    changed: Notify,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, Versioned<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value as it is; nobody changes it while this is held.
#[derive(Debug)]
pub struct Ref<'a, T>(MutexGuard<'a, Versioned<T>>);

impl<T> Deref for Ref<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.value
    }
}

/// The sender is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// Changes the value.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Sender<T> {
    /// Of a first value.
    pub fn new(value: T) -> Self {
        let state = Mutex::new(Versioned { value, version: 0, closed: false });
        Self(Arc::new(Shared { state, changed: Notify::new() }))
    }

    /// Another value; returns the one before.
    pub fn send_replace(&self, value: T) -> T {
        let mut before = value;
        self.send_modify(|current| std::mem::swap(current, &mut before));
        before
    }

    /// Changes the value in place.
    pub fn send_modify(&self, change: impl FnOnce(&mut T)) {
        {
            let mut state = self.0.state();
            change(&mut state.value);
            state.version += 1;
        }
        self.0.changed.notify_waiters();
    }

    /// Changes the value in place, unless `change` says that it did not; what it says.
    pub fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let changed = {
            let mut state = self.0.state();
            let changed = change(&mut state.value);
            state.version += u64::from(changed);
            changed
        };
        if changed {
            self.0.changed.notify_waiters();
        }
        changed
    }

    /// The value now.
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.0.state())
    }

    /// Sees every change from now on.
    pub fn subscribe(&self) -> Receiver<T> {
        let seen = self.0.state().version;
        Receiver { shared: Arc::clone(&self.0), seen }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.0.changed.notify_waiters();
    }
}

/// Waits for the value to change.
#[derive(Debug)]
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), seen: self.seen }
    }
}

impl<T> Receiver<T> {
    /// The value now.
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.shared.state())
    }

    /// The value now, which counts as seen.
    pub fn borrow_and_update(&mut self) -> Ref<'_, T> {
        let state = self.shared.state();
        self.seen = state.version;
        Ref(state)
    }

    /// The value now counts as seen.
    pub fn mark_unchanged(&mut self) {
        self.seen = self.shared.state().version;
    }

    /// Waits for a value that was not seen, which then counts as seen.
    ///
    /// # Errors
    /// The sender is gone.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        loop {
            // Made before the look: it hears of every change from here on.
            let notified = self.shared.changed.notified();
            {
                let state = self.shared.state();
                if state.version != self.seen {
                    self.seen = state.version;
                    return Ok(());
                }
                if state.closed {
                    return Err(Closed);
                }
            }
            notified.await;
        }
    }

    /// Waits for a value that is as wanted.
    ///
    /// # Errors
    /// The sender is gone and left another one.
    pub async fn wait_for(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Result<Ref<'_, T>, Closed> {
        loop {
            let notified = self.shared.changed.notified();
            {
                let state = self.shared.state();
                self.seen = state.version;
                if wanted(&state.value) {
                    break;
                }
                if state.closed {
                    return Err(Closed);
                }
            }
            notified.await;
        }
        Ok(Ref(self.shared.state()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn waiters_wake_in_the_order_in_which_they_began() {
        let (sender, order) = (Sender::new(0), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = Vec::new();
        for waiter in 0..20 {
            let (mut receiver, order) = (sender.subscribe(), Arc::clone(&order));
            tasks.push(tokio::spawn(async move {
                receiver.wait_for(|value| *value == 2).await.unwrap();
                order.lock().unwrap().push(waiter);
            }));
        }
        tokio::task::yield_now().await;
        assert_eq!((sender.send_replace(1), sender.send_replace(2)), (0, 1));
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn changes_are_seen_once_and_the_end_is_told() {
        let sender = Sender::new("a");
        let mut receiver = sender.subscribe();
        let soon = Duration::from_millis(5);
        assert!(tokio::time::timeout(soon, receiver.changed()).await.is_err());
        sender.send_modify(|value| *value = "b");
        assert_eq!(receiver.changed().await, Ok(()));
        assert_eq!(*receiver.borrow(), "b");
        sender.send_replace("c");
        receiver.mark_unchanged();
        assert!(tokio::time::timeout(soon, receiver.changed()).await.is_err());
        drop(sender);
        assert_eq!(receiver.changed().await, Err(Closed));
        assert_eq!(receiver.wait_for(|value| *value == "a").await.err(), Some(Closed));
        assert_eq!(*receiver.wait_for(|value| *value == "c").await.unwrap(), "c");
    }
}
