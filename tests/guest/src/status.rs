//! All counters of a guest, told to whoever asks by UDP.

use std::net::UdpSocket;
use std::sync::{Arc, Mutex, PoisonError};

use crate::clock;
use crate::json::Json;

/// Any datagram to this port is answered with the counters.
pub const PORT: u16 = 7007;

type Part = (String, Box<dyn Fn() -> Json + Send>);

/// The parts that have something to tell.
#[derive(Clone, Default)]
pub struct Status {
    parts: Arc<Mutex<Vec<Part>>>,
}

impl Status {
    /// Adds a part; what it tells at once must be one consistent state.
    pub fn add(&self, name: &str, part: impl Fn() -> Json + Send + 'static) {
        self.parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((name.to_owned(), Box::new(part)));
    }

    /// All parts as one object.
    pub fn report(&self) -> String {
        let mut json = Json::new();
        json.number("boottime_ns", clock::boottime_ns());
        for (name, part) in self
            .parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            json.object(name, part());
        }
        json.finish()
    }

    /// Answers in a thread of its own from now on.
    pub fn serve(&self) -> Result<(), String> {
        let socket = UdpSocket::bind(("0.0.0.0", PORT))
            .map_err(|error| format!("cannot bind UDP port {PORT}: {error}"))?;
        let status = self.clone();
        std::thread::spawn(move || {
            let mut buffer = [0u8; 2048];
            loop {
                if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    // Whoever asked asks again when the answer is lost.
                    let _ = socket.send_to(status.report().as_bytes(), from);
                }
            }
        });
        Ok(())
    }
}

/// State that a workload changes and the status reads.
pub fn shared<T: Send + 'static>(
    status: &Status,
    name: &str,
    value: T,
    tell: impl Fn(&T) -> Json + Send + 'static,
) -> Arc<Mutex<T>> {
    let state = Arc::new(Mutex::new(value));
    let told = state.clone();
    status.add(name, move || tell(&lock(&told)));
    state
}

/// Locks, whatever happened to another holder.
pub fn lock<T>(state: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
