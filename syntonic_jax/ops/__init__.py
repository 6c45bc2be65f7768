"""The operations, one file each: public function, jnp reference, primitives, rules."""
