//! The wire between the hosts: a hub for Ethernet frames. Each host's second
//! NIC is a pair of Unix datagram sockets, one frame a datagram, so nothing
//! leaves this machine and no right is needed. A frame that comes in at one
//! port goes out at all others, unless the link between the two is cut.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

/// Frames that may wait for one host; more are dropped and counted.
const QUEUE_MAX: usize = 4096;
/// No NIC here sends more in one frame.
const FRAME_MAX: usize = 70_000;
/// How often the hub looks whether it should end.
const TICK: Duration = Duration::from_millis(200);

/// Where one host is plugged in.
pub struct Plug {
    /// The hub's socket.
    pub port: PathBuf,
    /// The host's socket.
    pub nic: PathBuf,
}

/// Which links are cut, shared with whoever may change that.
#[derive(Clone, Default)]
pub struct Links {
    cut: Arc<Mutex<Vec<(usize, usize)>>>,
}

impl Links {
    /// Cuts or mends the way from one host to another; the way back is
    /// another link.
    pub fn set(&self, from: usize, to: usize, up: bool) {
        let mut cut = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        cut.retain(|link| *link != (from, to));
        if !up {
            cut.push((from, to));
        }
    }

    fn up(&self, from: usize, to: usize) -> bool {
        let cut = self.cut.lock().unwrap_or_else(PoisonError::into_inner);
        !cut.contains(&(from, to))
    }
}

struct Port {
    socket: UnixDatagram,
    nic: PathBuf,
    connected: bool,
    queue: VecDeque<Arc<[u8]>>,
}

/// The hub, with its sockets bound.
pub struct Hub {
    ports: Vec<Port>,
    links: Links,
    dropped: u64,
}

impl Hub {
    /// Binds the hub's sockets; the hosts' ones may come later.
    pub fn bind(plugs: Vec<Plug>, links: Links) -> Result<Self> {
        let mut ports = Vec::new();
        for plug in plugs {
            // It's fine when there was none.
            let _ = std::fs::remove_file(&plug.port);
            let socket = UnixDatagram::bind(&plug.port)
                .with_context(|| format!("cannot bind {}", plug.port.display()))?;
            socket
                .set_nonblocking(true)
                .context("cannot make a socket non-blocking")?;
            ports.push(Port {
                socket,
                nic: plug.nic,
                connected: false,
                queue: VecDeque::new(),
            });
        }
        Ok(Hub {
            ports,
            links,
            dropped: 0,
        })
    }

    /// Forwards frames until `stop` is set; returns how many were dropped
    /// because a host didn't take them.
    pub fn run(mut self, stop: &AtomicBool) -> u64 {
        let mut buffer = vec![0u8; FRAME_MAX];
        while !stop.load(Ordering::Relaxed) {
            self.wait();
            for from in 0..self.ports.len() {
                self.receive(from, &mut buffer);
            }
            for port in &mut self.ports {
                self.dropped += port.flush();
            }
        }
        self.dropped
    }

    fn wait(&self) {
        let mut polls: Vec<libc::pollfd> = self
            .ports
            .iter()
            .map(|port| libc::pollfd {
                fd: port.socket.as_raw_fd(),
                events: if port.queue.is_empty() {
                    libc::POLLIN
                } else {
                    libc::POLLIN | libc::POLLOUT
                },
                revents: 0,
            })
            .collect();
        // SAFETY: the array is ours and as long as said; a failure (EINTR)
        // only means that the sockets are tried early.
        unsafe {
            libc::poll(
                polls.as_mut_ptr(),
                polls.len() as libc::nfds_t,
                TICK.as_millis() as libc::c_int,
            );
        }
    }

    /// Takes a bounded number of frames from one port, for fairness.
    fn receive(&mut self, from: usize, buffer: &mut [u8]) {
        for _ in 0..64 {
            let Some(count) = self
                .ports
                .get(from)
                .and_then(|port| port.socket.recv(buffer).ok())
            else {
                return;
            };
            let Some(frame) = buffer.get(..count) else {
                return;
            };
            let frame: Arc<[u8]> = frame.into();
            for (to, port) in self.ports.iter_mut().enumerate() {
                if to == from || !self.links.up(from, to) {
                    continue;
                }
                if port.queue.len() < QUEUE_MAX {
                    port.queue.push_back(frame.clone());
                } else {
                    self.dropped += 1;
                }
            }
        }
    }
}

impl Port {
    /// Sends what waits, as far as the host takes it.
    fn flush(&mut self) -> u64 {
        if !self.connected && !self.queue.is_empty() {
            self.connected = self.socket.connect(&self.nic).is_ok();
        }
        let mut dropped = 0;
        while let Some(frame) = self.queue.front() {
            match self.socket.send(frame) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return dropped,
                // The host isn't there (yet): its frames are lost, as on any wire.
                // When it comes back it's with another socket.
                Err(_) => {
                    self.connected = false;
                    dropped += 1;
                }
            }
            self.queue.pop_front();
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> Option<Vec<u8>> {
        let mut buffer = [0u8; 64];
        let count = socket.recv(&mut buffer).ok()?;
        buffer.get(..count).map(<[u8]>::to_vec)
    }

    #[test]
    fn frames_reach_all_others_unless_their_link_is_cut() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("xl-vne-hub-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let mut nics = Vec::new();
        let mut plugs = Vec::new();
        for number in 0..3 {
            let nic = dir.join(format!("nic{number}"));
            let socket = UnixDatagram::bind(&nic)?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            nics.push(socket);
            plugs.push(Plug {
                port: dir.join(format!("port{number}")),
                nic,
            });
        }
        let links = Links::default();
        let hub = Hub::bind(plugs, links.clone())?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || hub.run(&flag));

        nics[0].send_to(b"one", dir.join("port0"))?;
        assert_eq!(receive(&nics[1]).as_deref(), Some(&b"one"[..]));
        assert_eq!(receive(&nics[2]).as_deref(), Some(&b"one"[..]));

        links.set(0, 1, false);
        nics[0].send_to(b"two", dir.join("port0"))?;
        assert_eq!(receive(&nics[2]).as_deref(), Some(&b"two"[..]));
        assert_eq!(receive(&nics[1]), None);
        nics[1].send_to(b"back", dir.join("port1"))?;
        assert_eq!(receive(&nics[0]).as_deref(), Some(&b"back"[..]));

        links.set(0, 1, true);
        nics[0].send_to(b"three", dir.join("port0"))?;
        assert_eq!(receive(&nics[1]).as_deref(), Some(&b"three"[..]));

        stop.store(true, Ordering::Relaxed);
        assert!(thread.join().is_ok());
        std::fs::remove_dir_all(dir)?;
        Ok(())
    }

    #[test]
    fn a_host_that_was_away_gets_frames_again_and_none_from_meanwhile() -> Result<()> {
        let dir = std::env::temp_dir().join(format!("xl-vne-hub-away-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let nic = |number: usize| dir.join(format!("nic{number}"));
        let plugs = (0..2).map(|number| Plug {
            port: dir.join(format!("port{number}")),
            nic: nic(number),
        });
        let mut hub = Hub::bind(plugs.collect(), Links::default())?;
        let mut buffer = vec![0u8; FRAME_MAX];
        let mut pass = || {
            hub.receive(0, &mut buffer);
            for port in &mut hub.ports {
                port.flush();
            }
        };
        let sender = UnixDatagram::bind(nic(0))?;
        let send = |text: &[u8]| sender.send_to(text, dir.join("port0"));
        let plug_in = || -> Result<UnixDatagram> {
            let socket = UnixDatagram::bind(nic(1))?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            Ok(socket)
        };

        let receiver = plug_in()?;
        send(b"one")?;
        pass();
        assert_eq!(receive(&receiver).as_deref(), Some(&b"one"[..]));

        drop(receiver);
        std::fs::remove_file(nic(1))?;
        for text in [b"two", b"2nd"] {
            send(text)?;
            pass();
        }

        let receiver = plug_in()?;
        send(b"three")?;
        pass();
        assert_eq!(receive(&receiver).as_deref(), Some(&b"three"[..]));
        std::fs::remove_dir_all(dir)?;
        Ok(())
    }
}
